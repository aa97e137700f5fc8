"""The CPU engine: works on addresses, shapes and strides, and never imports torch."""
