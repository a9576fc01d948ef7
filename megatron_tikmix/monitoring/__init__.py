"""What a run shows, and where: the files it leaves, TensorBoard, the terminal, report.html.

run_files   the rows as they are      decision    what one row of the ledger says
history     a run as arrays           report      the page, from pictures and tables
tensorboard, terminal                 the same rows, live
"""
