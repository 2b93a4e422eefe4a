"""What happens to computation: one pure function traced, looked through and run again.

In reading order: `compat` (what JAX calls things), `views` (one leaf looked at another
way), `operations` (what multiplies or looks up), `flows` and `provenance` (what every
value comes from), `sites` (the table of who consumes which parameter), `handlers`,
`interpreter` and `interpret` (run it again with a handler at each site), `matrices`,
`record` and `statistics` (what passes through the sites), `modules` (frameworks to pure
functions).
"""
