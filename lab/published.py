"""What papers report, to stand beside ours.

VTC (Sheng et al., OSDI'24): recomputed from the result logs in VTC-artifact (fair_bench/*/all_results_*.jsonl) with
the authors' formulae, which are those of `metrics`; A10G 24 GB, Llama 7B, a pool of 10,000 tokens. Their policies and
ours, by what they do:

    fcfs, stock-fcfs      FCFS          vtc:predict=average  VTC_predict, a moving average of lengths
    vtc                   VTC, WVTC     vtc-oracle           VTC_oracle, told the lengths
    rpm20                 LShare, RPM   vtc-oracle50         VTC_pred_50, told them ± 50 %
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple


class Row(NamedTuple):
    """One published run. Units as `metrics.Metrics`."""

    n: int
    done: int
    total_s: float
    max_diff: float
    avg_diff: float
    var_diff: float
    throughput: float
    acc_max: float
    ttft_s: tuple[float, ...] = ()
    """Mean first-token latency by tenant; for `real` its minimum, median and maximum over tenants."""


VTC: Final[Mapping[str, Mapping[str, Row]]] = MappingProxyType(
    {
        "real": {
            "FCFS": Row(1500, 1500, 758, 759.97, 433.53, 32112.00, 777, 154034, (0.48, 54.65, 132.01)),
            "VTC": Row(1500, 1500, 756, 368.40, 251.66, 6549.16, 779, 145560, (0.27, 2.77, 135.39)),
            "VTC_predict": Row(1500, 1500, 761, 365.47, 240.33, 5321.62, 773, 142376, (0.27, 3.77, 135.29)),
            "VTC_oracle": Row(1500, 1500, 754, 329.46, 227.51, 4475.76, 781, 143687, (0.65, 3.94, 138.08)),
            "LCF": Row(1500, 1500, 756, 750.49, 323.82, 29088.90, 778, 119733, (0.13, 1.76, 106.61)),
            "RPM30": Row(1500, 1324, 688, 693.66, 309.45, 24221.31, 747, 142777, (0.27, 22.56, 62.95)),
            "RPM20": Row(1500, 1158, 637, 446.76, 195.71, 7449.79, 694, 107856, (0.12, 3.93, 16.59)),
            "RPM15": Row(1500, 1053, 631, 343.07, 161.06, 5188.79, 626, 78289, (0.12, 1.55, 11.42)),
            "RPM10": Row(1500, 900, 619, 217.65, 128.24, 2767.44, 532, 52422, (0.11, 0.36, 2.05)),
            "RPM5": Row(1500, 581, 616, 143.86, 83.58, 1020.46, 340, 24692, (0.09, 0.21, 0.26)),
        },
        "overload-fcfs": {"FCFS": Row(2700, 2700, 1579, 447.37, 439.00, 30.62, 876, 237738, (484.9, 485.0))},
        "overload": {
            "VTC": Row(1620, 1620, 929, 192.88, 103.77, 6981.24, 893, 9050, (124.5, 353.4)),
            "VTC_pred_50": Row(1620, 1620, 917, 33.98, 12.54, 111.94, 904, 1789, (126.0, 348.6)),
            "VTC_oracle": Row(1620, 1620, 927, 5.87, 0.51, 1.71, 895, 377, (127.0, 350.7)),
        },
        "overload-multi": {
            "FCFS": Row(
                1512, 1512, 885, 247.88, 230.81, 1083.63, 875, 34823,
                (255.8, 258.2, 257.1, 255.6, 255.2, 254.7, 253.9, 255.8),
            ),
            "VTC": Row(
                1512, 1512, 885, 322.16, 162.20, 5151.49, 875, 2976,
                (149.6, 151.1, 151.7, 294.9, 295.7, 295.3, 295.2, 294.5),
            ),
            "VTC_pred_50": Row(
                1512, 1512, 884, 99.43, 66.32, 487.10, 875, 1277,
                (151.8, 156.4, 155.3, 296.6, 295.5, 296.8, 295.6, 294.1),
            ),
            "VTC_oracle": Row(
                1512, 1512, 884, 43.23, 36.34, 56.52, 875, 746,
                (153.6, 157.9, 157.8, 295.5, 295.7, 295.1, 294.7, 295.6),
            ),
        },
        "weighted": {
            "WVTC": Row(1440, 1440, 820, 578.30, 538.72, 6869.56, 899, 219855, (224.7, 224.9, 225.6, 225.4)),
        },
        "overload-weighted": {
            "VTC": Row(1584, 1584, 915, 270.20, 143.62, 5192.32, 886, 4556, (149.7, 149.7, 286.7, 385.3)),
        },
        "proportional": {
            "FCFS": Row(1350, 1350, 807, 157.23, 145.32, 70.36, 856, 390418, (97.2, 97.5, 96.4)),
            "VTC": Row(1350, 1350, 782, 25.72, 9.91, 41.48, 883, 310537, (4.8, 4.9, 124.4)),
        },
        "on_off_less": {
            "FCFS": Row(1350, 1350, 790, 276.06, 115.84, 6774.44, 875, 546184, (85.2, 93.2)),
            "VTC": Row(1350, 1350, 788, 69.46, 56.08, 248.29, 877, 505162, (3.5, 102.4)),
        },
        "on_off_overload": {
            "FCFS": Row(2400, 2400, 1403, 1317.14, 433.48, 127849.30, 876, 363415, (374.1, 413.5)),
            "VTC": Row(2400, 2400, 1397, 222.74, 109.53, 4990.00, 879, 7541, (75.4, 509.5)),
        },
        "poisson_short_long": {
            "FCFS": Row(5700, 5700, 722, 354.87, 209.31, 8468.67, 1475, 204786, (69.2, 67.7)),
            "VTC": Row(5700, 5700, 737, 132.69, 33.82, 839.27, 1445, 5235, (132.7, 44.9)),
        },
        "poisson_short_long_2": {
            "VTC": Row(5700, 5700, 1856, 47.19, 13.67, 204.14, 1671, 1281, (901.5, 302.7)),
        },
        "poisson_short_long_2-fcfs": {
            "FCFS": Row(2850, 2850, 806, 1063.12, 693.26, 50766.27, 1923, 605361, (250.2, 244.6)),
        },
        "increase": {
            "FCFS": Row(960, 960, 661, 89.83, 28.45, 839.56, 743, 212399, (7.2, 11.7)),
            "VTC": Row(960, 960, 661, 23.20, 6.50, 55.44, 744, 191892, (0.3, 14.6)),
        },
        "dist_shift": {
            "LCF": Row(1889, 1889, 1076, 185.96, 114.31, 3331.89, 899, 258609, (4.1, 132.9)),
            "VTC": Row(1889, 1889, 1071, 108.25, 33.45, 1095.86, 903, 264472, (16.3, 124.3)),
        },
    }
)  # fmt: skip
"""By suite of `suites`, by the authors' name of the scheduler."""

PEER: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "fcfs": ("FCFS",),
        "stock-fcfs": ("FCFS",),
        "vtc": ("VTC", "WVTC"),
        "vtc:predict=average": ("VTC_predict",),
        "vtc-oracle": ("VTC_oracle",),
        "vtc-oracle50": ("VTC_pred_50",),
        **{f"rpm{most}": (f"RPM{most}",) for most in (5, 10, 15, 20, 30)},
    }
)
"""Which of theirs stand beside which of ours, with its settings: the first that was run on the suite."""


def peer(suite: str, policy: str) -> tuple[str, Row] | None:
    """The published run that one of ours, `vtc` or `vtc:predict=average`, is to be compared with, or None."""
    rows = VTC.get(suite, {})
    return next(((name, rows[name]) for name in PEER.get(policy, ()) if name in rows), None)
