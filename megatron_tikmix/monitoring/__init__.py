"""What a run leaves behind, and how it is shown: on the terminal, in TensorBoard, in report.html.

files        the rows that training appends, read as they are
history      a run as arrays
words        numbers, names and decisions as people read them
answers      what one asks of a run, as plain values
tables       one Table, for the terminal and for report.html
figures      the pictures of report.html
report       report.html itself, with its template
tensorboard, terminal    the same rows, live
"""
