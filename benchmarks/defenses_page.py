def write(page, work): pass
