"""The pretraining loop and what it is made of: optimizer, objectives, checkpoints and metric writers."""
