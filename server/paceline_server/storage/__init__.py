"""Where a shard's state is kept: a journal in SQLite, snapshots in safetensors, and what brings them back.

`directory` has the layout and the lock, `encoding` how records are written, `segment` one file of the journal,
`durable` the journal itself, `snapshot` and `snapshotter` snapshots and when they are written, `recovery` the way back.
"""
