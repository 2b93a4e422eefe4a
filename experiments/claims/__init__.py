"""What is claimed of the library, each as one command that shows it.

Every file trains or prunes, writes one JSON per finished run, and makes a result, a
table and a picture of them; the committed ones lie in `results/`.
"""
