"""The kernels of Hopper, in Gluon."""
