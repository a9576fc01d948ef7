"""Shows a run and its files: on the terminal, in TensorBoard, in report.html.

files        the rows that training appends, read unchanged
history      a run as arrays
words        numbers, names and decisions in words
answers      answers to questions about a run, as plain values
tables       one Table, for the terminal and for report.html
figures      the pictures of report.html
report       report.html itself, with its template
tensorboard, terminal    the same rows, live
"""
