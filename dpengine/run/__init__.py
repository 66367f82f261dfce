"""What a run keeps on disk: ledger, checkpoints, report and card, and how files are written.

Nothing is imported here: ledger, digests and durable files need no torch.
"""
