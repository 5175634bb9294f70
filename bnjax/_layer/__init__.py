"""What the layers of every framework share: a kind's recipe, the call, ghost batches."""
