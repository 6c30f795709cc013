-- Materialized views that read the table: made anew on the result, as CREATE OR REPLACE cannot re-point them.

-- name: all
-- `head` and `query` make it again; `rest`, with chr(1) for its name, gives it what it had; `others` is what hangs on it and is not
-- carried over. Ours is what we may drop and own.
SELECT v.oid::bigint AS oid, n.nspname AS schema_name, v.relname AS name, v.relispopulated AS populated, rtrim(pg_get_viewdef(v.oid), ';') AS query,
       concat(' USING ' || quote_ident(m.amname), ' WITH (' || array_to_string(v.reloptions, ', ') || ')', ' TABLESPACE ' || quote_ident(s.spcname)) AS head,
       pg_get_userbyid(v.relowner) AS owner,
       pg_has_role(v.relowner, 'USAGE') AND has_schema_privilege(v.relnamespace, 'CREATE') AND t.ours AS ours, pg_table_size(v.oid) AS bytes, coalesce(g.of_others, false) AS granted_by_others,
       concat_ws('; ', c.columns, g.grants,
                 format('COMMENT ON MATERIALIZED VIEW %s IS %L', chr(1), obj_description(v.oid, 'pg_class'))) AS rest,
       (SELECT array_agg(DISTINCT pg_describe_object(o.classid, o.objid, o.objsubid)) FROM pg_depend o
          LEFT JOIN pg_rewrite w ON o.classid = 'pg_rewrite'::regclass AND w.oid = o.objid LEFT JOIN pg_class reader ON reader.oid = w.ev_class
         WHERE o.deptype IN ('n', 'a') AND (o.refclassid = 'pg_class'::regclass AND o.refobjid = v.oid
                OR o.refclassid = 'pg_type'::regclass AND o.refobjid IN (SELECT t FROM pg_type y, LATERAL (VALUES (y.oid), (y.typarray)) a(t) WHERE y.oid = v.reltype))
           AND o.classid <> 'pg_class'::regclass AND (w.oid IS NULL OR w.ev_class <> v.oid AND (reader.relkind <> 'v' OR w.rulename <> '_RETURN'))) AS others
  FROM pg_class v JOIN pg_namespace n ON n.oid = v.relnamespace LEFT JOIN pg_am m ON m.oid = v.relam LEFT JOIN pg_tablespace s ON s.oid = v.reltablespace
 CROSS JOIN LATERAL (
       SELECT string_agg(concat_ws('; ', format('COMMENT ON COLUMN %s.%I IS %L', chr(1), a.attname, col_description(v.oid, a.attnum)),
                format('ALTER MATERIALIZED VIEW %s ALTER %I SET ', chr(1), a.attname) || 'STATISTICS ' || nullif(to_jsonb(a) ->> 'attstattarget', '-1'),
                format('ALTER MATERIALIZED VIEW %s ALTER %I SET ', chr(1), a.attname) || '(' || array_to_string(a.attoptions, ', ') || ')'), '; ' ORDER BY a.attnum) AS columns
         FROM pg_attribute a WHERE a.attrelid = v.oid AND a.attnum > 0
          AND (col_description(v.oid, a.attnum) IS NOT NULL OR coalesce(to_jsonb(a) ->> 'attstattarget', '-1') <> '-1' OR a.attoptions IS NOT NULL)) c
 CROSS JOIN LATERAL (
       SELECT bool_or(x.grantor <> v.relowner) AS of_others, string_agg(concat(
                CASE WHEN x.grantor <> v.relowner THEN format('SET LOCAL ROLE %I; ', pg_get_userbyid(x.grantor)) END,
                format('GRANT %s%s ON %s TO %s%s', x.privilege_type, ' (' || quote_ident(x.attname) || ')', chr(1),
                       CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END, CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' END),
                CASE WHEN x.grantor <> v.relowner THEN '; RESET ROLE' END), '; ' ORDER BY x.grantor <> v.relowner, x.attname NULLS FIRST, x.privilege_type) AS grants
         FROM (SELECT NULL AS attname, t.* FROM aclexplode(v.relacl) t UNION ALL
               SELECT a.attname, t.* FROM pg_attribute a CROSS JOIN LATERAL aclexplode(a.attacl) t WHERE a.attrelid = v.oid) x WHERE x.grantee <> v.relowner) g
 CROSS JOIN LATERAL (  -- the views that read it are re-pointed
       SELECT coalesce(bool_and(pg_has_role(c.relowner, 'USAGE')), true) AS ours FROM pg_depend d JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
         JOIN pg_class c ON c.oid = r.ev_class AND c.relkind = 'v' WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = v.oid) t
 WHERE v.relkind = 'm' AND EXISTS (SELECT FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
                                    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid} AND r.ev_class = v.oid)
 ORDER BY n.nspname, v.relname

-- name: create
CREATE MATERIALIZED VIEW {view} {head} AS {query} WITH NO DATA

-- name: own
DO {block}

-- name: hand_over
-- Whoever is to own it must be able to create in its schema, which is there for this alone.
BEGIN
  IF {owner_text} <> current_user THEN
    GRANT CREATE ON SCHEMA {schema} TO {owner};
    ALTER MATERIALIZED VIEW {view} OWNER TO {owner};
  END IF;
END

-- name: forget
DROP MATERIALIZED VIEW IF EXISTS {view};
DROP SCHEMA IF EXISTS {schema}

-- name: standing
SELECT relispopulated AS populated, pg_get_userbyid(relowner) AS owner FROM pg_class WHERE oid = {oid}

-- name: refresh
-- It reads what its owner may read, by the owner's policies.
REFRESH MATERIALIZED VIEW {view}

-- name: try
-- Permissions are looked at, and nothing is read.
SET LOCAL ROLE {owner};
EXPLAIN {query}

-- name: set_schema
-- Its indexes go with it.
ALTER MATERIALIZED VIEW {view} SET SCHEMA {to}

-- name: cluster
ALTER MATERIALIZED VIEW {view} CLUSTER ON {index}

-- name: hold
-- LOCK TABLE takes no materialized view; this changes nothing, and locks it as what changes it does.
ALTER MATERIALIZED VIEW {view} OWNER TO {owner}
