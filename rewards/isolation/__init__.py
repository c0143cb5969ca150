"""What the sandbox is made of: the ways to enclose a program, the seccomp filter, what a program uses."""
