"""Where a store lies: a folder, a bucket, a web address; behind one door to named bytes."""
