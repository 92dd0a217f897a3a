"""Where benchmarks find models and data: in the repository, and in a folder `shared` beside it.

docs/benchmarks.md says which program needs what, and what lies in `shared`.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
DEMO_MODEL = HERE.parent / "examples" / "demo-model"
SHARED = next(  # beside the checkout, or beside the folder of its worktrees
    (up / "shared" for up in HERE.parents if (up / "shared" / "data").is_dir()),
    HERE.parents[1] / "shared",
)
TEXTS = SHARED / "data" / "text"  # DOMAIN.plan.jsonl, DOMAIN.heldout.jsonl: a JSON string a line
ROUTING = SHARED / "data" / "routing"  # deepseek_v2_lite_DOMAIN.npz
REQUESTS = SHARED / "data" / "requests"  # arrivals of real services


def text_files(folder: Path, split: str) -> list[Path]:
    """Texts of every domain; `split` is "plan" or "heldout". Ends the program where there are
    none."""
    found = sorted(folder.glob(f"*.{split}.jsonl"))
    if not found:
        raise SystemExit(
            f"no *.{split}.jsonl in {folder}: this program needs texts that are not in the"
            " repository (docs/benchmarks.md)"
        )
    return found
