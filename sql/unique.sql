-- Guards: what was unique in the source stays unique over all partitions. Each is a table of the key's values with one
-- unique index of the original name, so that a duplicate waits, fails and is reported as it was before.

-- name: own_schema
ALTER SCHEMA {guards} OWNER TO {owner}

-- name: fill
CREATE TABLE {guard} AS SELECT {values} FROM {shadow} r {where}

-- name: create_index
CREATE UNIQUE INDEX {index} ON {guard} ({parts}) {nulls}

-- name: defer
-- To the commit, also where the key was checked at the end of each statement: the trigger's statements are smaller ones.
ALTER TABLE {guard} ADD CONSTRAINT {index} UNIQUE USING INDEX {index} DEFERRABLE INITIALLY DEFERRED

-- name: settle
-- REPLICA IDENTITY FULL, or deletes fail where a publication covers it.
ALTER TABLE {guard} REPLICA IDENTITY FULL;
ANALYZE {guard}

-- name: create_function
-- SECURITY DEFINER: the application's role has no rights on the guard. enable_seqscan off: a plan made while the guard was
-- small must not stay. A row that moves is deleted and inserted, in this order.
CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
BEGIN
  IF TG_OP <> 'INSERT' THEN
    {release};
  END IF;
  IF TG_OP <> 'DELETE' THEN
    INSERT INTO {guard} SELECT {values} FROM ({new_row}) r {where};
  END IF;
  RETURN NULL;
END $$;
ALTER FUNCTION {function}() OWNER TO {owner}

-- name: release
DELETE FROM {guard} g USING (SELECT {values} FROM ({old_row}) r {where}) o WHERE {g_is_o}

-- name: release_one
-- Of a deferrable key there may be two for a while: one of them goes, and not one that somebody else takes.
DELETE FROM {guard} WHERE ctid = ANY (ARRAY(
      SELECT g.ctid FROM {guard} g, (SELECT {values} FROM ({old_row}) r {where}) o WHERE {g_is_o} LIMIT 1 FOR UPDATE OF g))

-- name: attach
-- AFTER row triggers, cloned to every partition: a BEFORE trigger would turn a harmless ON CONFLICT DO NOTHING into an error.
-- ALWAYS: a session in replica mode is held to it, too, as it is to an index. A function compares: as the operator's operands
-- the server prints rows without their ::record, and no dump could be restored.
CREATE TRIGGER {row_trigger} AFTER INSERT OR DELETE ON {shadow} FOR EACH ROW EXECUTE FUNCTION {function}();
CREATE TRIGGER {update_trigger} AFTER UPDATE ON {shadow} FOR EACH ROW
  WHEN (pg_catalog.record_image_ne(ROW({old_watched}), ROW({new_watched}))) EXECUTE FUNCTION {function}();
ALTER TABLE {shadow} ENABLE ALWAYS TRIGGER {row_trigger};
ALTER TABLE {shadow} ENABLE ALWAYS TRIGGER {update_trigger}

-- name: attach_leaf
-- On 14 and 15 ALWAYS on the root does not reach the partitions.
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {row_trigger};
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {update_trigger}

-- name: create_truncate_function
-- Of a partition that was emptied no row tells which values went: whatever the whole table lacks goes. By an old snapshot neither the
-- rows that came since are seen nor their values, and both would have to go.
CREATE FUNCTION {truncate_function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF pg_partition_root(TG_RELID) IS NULL THEN  -- detached since: what it held is no concern of the table's
    RETURN NULL;
  ELSIF pg_partition_root(TG_RELID) = TG_RELID THEN
    TRUNCATE {guard};
    RETURN NULL;
  ELSIF pg_relation_size($guard${guard}$guard$) = 0 THEN  -- it was emptied with the whole table
    RETURN NULL;
  ELSIF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
    RAISE feature_not_supported USING MESSAGE = format('%s cannot be truncated alone in a %s transaction: values that came since its snapshot would stay'
      ' taken in %s. TRUNCATE it in a READ COMMITTED transaction.', TG_RELID::regclass, upper(current_setting('transaction_isolation')), $guard${guard}$guard$);
  END IF;
  EXECUTE $delete$DELETE FROM {guard} g WHERE NOT EXISTS (SELECT FROM (SELECT {values} FROM $delete$ || pg_partition_root(TG_RELID)::regclass::text || $delete$ r {where}) o WHERE {g_is_o})$delete$;
  RETURN NULL;
END $$;
ALTER FUNCTION {truncate_function}() OWNER TO {owner}

-- name: attach_truncate
CREATE TRIGGER {truncate_trigger} AFTER TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION {truncate_function}();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {truncate_trigger}

-- name: forget_detached
-- After a partition with rows was detached: their values are free again.
DELETE FROM {guard} g WHERE NOT EXISTS (SELECT FROM (SELECT {values} FROM {source} r {where}) o WHERE {g_is_o})

-- name: take_attached
-- After a partition with rows was attached, in the same transaction: a duplicate is refused (23505).
INSERT INTO {guard} SELECT {values} FROM {attached} r {where}
