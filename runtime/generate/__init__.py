"""From a prompt to text: tokens, sampling, the decoding core and its sequences, snapshots."""
