"""Which experts tokens choose, and what follows: traces, caches, placements and the cost of gating.

The models of "Towards MoE Deployment" (arXiv 2303.06182) and their modern relatives.
"""
