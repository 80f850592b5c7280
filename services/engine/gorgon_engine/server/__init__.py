"""The engine as a service: HTTP inside a deployment, between the gateway and the model's thread."""
