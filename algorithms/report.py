"""A run as one HTML file, or several runs on one page; `algorithms.common.report` says what is on it.

python algorithms/report.py --run runs/ppo_libero_spatial_1
python algorithms/report.py --run runs/ppo_libero_spatial_1 runs/ppo_libero_spatial_2
"""

from algorithms.common.command_line import launch, parse_args
from algorithms.common.report import Args, check_args, main

if __name__ == "__main__":
    launch(main, parse_args(Args, __doc__, None, check_args))
