from lawcat_edge.cli import main

main()
