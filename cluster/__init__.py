"""The whole: configuration, coordinator, Serve application, ingress, command line, telemetry."""
