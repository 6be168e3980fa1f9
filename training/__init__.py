"""One way through training: config, mesh, data, model, weights, state, epochs, report."""
