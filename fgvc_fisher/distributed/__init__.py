"Several processes and machines: which of them this is, sharded tensors, files they share, workers on this machine"
