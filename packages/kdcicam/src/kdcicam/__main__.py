"""`python -m kdcicam`, which `accelerate launch -m kdcicam` and torchrun start in several processes."""

from kdcicam.cli import main

main()
