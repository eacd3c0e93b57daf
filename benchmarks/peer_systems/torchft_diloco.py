"""torchft's DiLoCo over gloo: a lighthouse, and each worker a replica group of one process.

Option "delay": inner steps before a round's end at which its all-reduce begins (torchft's fragment_sync_delay); 0 waits
for it at once. With a delay, local and global parameters are mixed half and half, as in Streaming DiLoCo.
"""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo

from peer_systems.process import ready
from peer_systems.setting import Setting
from peer_systems.training import Training

TIMEOUT = timedelta(minutes=10)


def coordinate(setting: Setting) -> None:
    """Run the lighthouse."""
    lighthouse = LighthouseServer(
        bind=f"0.0.0.0:{setting.port}",  # in a namespace, or on a machine of one's own
        min_replicas=setting.workers,
        join_timeout_ms=60_000,
    )
    ready()
    try:
        while True:
            time.sleep(3600)
    finally:
        lighthouse.shutdown()


def work(setting: Setting, training: Training) -> None:
    """Make all rounds of one worker."""
    os.environ["GLOO_SOCKET_IFNAME"] = setting.interface
    store = dist.TCPStore(setting.host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # it has
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=lambda _: None,
        state_dict=dict,
        min_replica_size=setting.workers,
        use_async_quorum=False,
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr=setting.host,
        store_port=store.port,
        lighthouse_addr=f"http://{setting.coordinator}",
        replica_id=f"worker_{setting.rank}",
        hostname=setting.host,
        init_sync=False,
    )
    delay = int(setting.options["delay"])
    diloco = DiLoCo(
        manager,
        [training.model],
        training.optimizer,
        torch.optim.SGD(training.model.parameters(), lr=0.7, momentum=0.9, nesterov=True),
        sync_every=setting.inner_steps,
        fragment_sync_delay=delay,
        fragment_update_alpha=0.5 if delay else 0.0,
    )
    with diloco:
        for _ in training.rounds_with_hook():
            # The outer gradients are left in the parameters, and would be taken for gradients by the inner optimizer.
            training.optimizer.zero_grad()
    if manager.current_step() != training.num_rounds:
        raise RuntimeError(f"{manager.current_step()} of {training.num_rounds} rounds were committed")
    manager.shutdown(wait=False)
