"""DataLoader workers that are forked from a process that has joined a run."""

import subprocess
import sys
from pathlib import Path

import paceline_server

SCRIPT = """
import sys
import paceline
import torch
from torch.utils.data import DataLoader, TensorDataset

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.randn(64, 4))
with paceline.join(sys.argv[1], model, optimizer, inner_steps=4) as run:
    for epoch in range(2):
        for (x,) in DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork"):
            model(x).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
print(run.stats().rounds)
"""


def test_forked_loaders_work_after_joining(tmp_path: Path) -> None:
    """Loaders forked while the exchange runs deliver every batch, and the run goes on."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with paceline_server.local() as address:
        done = subprocess.run([sys.executable, script, address], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
