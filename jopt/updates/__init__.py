"""What happens to parameters: optimizer wrappers, no technique.

Reading order: `project` (keep params on a set while the inner optimizer steps latent
values), `states` (find and change wrapper states however deep they are nested).
"""
