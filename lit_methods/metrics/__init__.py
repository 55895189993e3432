"""``torchmetrics.Metric`` subclasses that torchmetrics lacks."""
