"""The MLP with a depthwise convolution: `forward`."""
