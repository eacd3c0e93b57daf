"""`paceline demo`: a whole run on one machine, with real processes, real sockets and an emulated wide-area link."""
