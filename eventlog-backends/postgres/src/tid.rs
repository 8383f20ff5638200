//! Where a row lies in its table.

use sqlx::{
    Encode, Postgres, Type,
    encode::IsNull,
    error::BoxDynError,
    postgres::{PgArgumentBuffer, PgHasArrayType, PgRow, PgTypeInfo, PgValueFormat, types::Oid},
};
use sqlx::{Row as _, ValueRef as _};

/// A `ctid`: found by it, a row costs a third of what it costs to be found by its key. It may move (`VACUUM FULL`), and
/// another may come to lie in its place, so whoever uses it asks for the key besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tid([u8; 6]);

// https://www.postgresql.org/docs/15/catalog-pg-type.html: these are part of the protocol.
const TID: Oid = Oid(27);
const TID_ARRAY: Oid = Oid(1010);

impl Tid {
    /// In column `column`; nowhere if it is not there.
    pub(crate) fn get(row: &PgRow, column: usize) -> Self {
        let value = row.try_get_raw(column).ok().filter(|value| !value.is_null());
        let bytes = value
            .filter(|value| value.format() == PgValueFormat::Binary)
            .and_then(|value| value.as_bytes().ok());
        Self(bytes.and_then(|bytes| bytes.try_into().ok()).unwrap_or_default())
    }
}

impl Type<Postgres> for Tid {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(TID)
    }
}

impl PgHasArrayType for Tid {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(TID_ARRAY)
    }
}

impl Encode<'_, Postgres> for Tid {
    fn encode_by_ref(&self, buf: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        buf.extend_from_slice(&self.0);
        Ok(IsNull::No)
    }
}
