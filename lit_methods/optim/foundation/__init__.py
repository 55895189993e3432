"""What several optimizers need: flat views of parameters, ranks, settings of groups."""
