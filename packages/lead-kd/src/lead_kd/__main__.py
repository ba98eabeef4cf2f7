"""`python -m lead_kd`, which launchers such as torchrun and `accelerate launch -m` start in each process."""

from lead_kd.cli import main

main()
