"""Training: plan a recipe, run it and write checkpoints. Main entry:
`model.training.run.train()`.
"""
