"""EntiGraph's published scaling curve on QuALITY (arXiv 2409.07431).

The points are those of the notebook `nb_main_plot.ipynb` in the paper's code; the coefficients are
those of its section 6.
"""

from experiments.entigraph_theory.theory import ExponentialFit

# Millions of synthetic tokens -> accuracy on the test questions, in percent.
POINTS = (
  *((0.1820, 40.15), (0.3185, 41.15), (0.4550, 41.21), (0.5915, 41.73), (0.7280, 42.60)),
  *((0.8645, 43.02), (0.9100, 42.96), (1.1375, 43.39), (1.8200, 43.48), (2.7300, 44.14)),
  *((3.6400, 45.22), (4.5500, 45.65), (5.4600, 45.70), (6.3700, 47.25), (8.1900, 47.18)),
  *((9.1000, 47.57), (13.65, 49.46), (22.75, 50.33), (25.025, 50.33), (29.575, 50.74)),
  *((38.675, 50.88), (45.5, 51.23), (68.25, 52.18), (113.75, 52.52), (159.25, 52.76)),
  *((191.1, 53.13), (204.75, 53.43), (236.6, 53.84), (250.25, 54.26), (295.75, 54.56)),
  *((327.6, 54.90), (341.25, 54.85), (373.1, 55.03), (414.05, 56.00), (441.35, 55.83)),
  (450.45, 56.22),
)
FIT = ExponentialFit(a=64.5456, b=(13.8352, 8.4705, 3.932), r=(0.9989, 0.8961, 0.0546))
