"""Who may call a shard, as whom and how much: credentials, identities, roles, revocation and limits."""
