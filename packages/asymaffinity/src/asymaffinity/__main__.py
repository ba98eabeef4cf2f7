"""``python -m asymaffinity``: what ``accelerate launch -m asymaffinity`` starts."""

from asymaffinity.cli import main

main()
