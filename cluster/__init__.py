"""The ground that jobs and serving stand on: config, storage, registry, data, training."""
