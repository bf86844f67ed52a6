"""`vmconv-qemu-img`: a front end that answers as qemu-img 7.2, and hands over what it does not do itself."""
