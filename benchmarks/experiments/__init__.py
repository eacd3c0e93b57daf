"""Workloads for the virtual-time simulator: many workers' small models, trained as rows of one stacked tensor."""
