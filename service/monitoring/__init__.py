"""Prometheus and Grafana files for the metrics of `service.metrics`; the dashboard is printed from `dashboard`."""
