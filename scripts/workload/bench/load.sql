-- Loads as many rows as parameter :n says, indexes two columns, and asks for a range.
pragma journal_mode = memory;
create table t(a integer primary key, b integer, c text);
with recursive n(i) as (select 1 union all select i + 1 from n where i < :n)
    insert into t select i, i * 7919 % 100003, printf('row %d of a table', i) from n;
create index tb on t(b);
create index tc on t(c);
select count(*), sum(b), max(c) from t where b between 1000 and 60000;
