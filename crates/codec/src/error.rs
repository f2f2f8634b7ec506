//! One error type for the whole codec. Every variant names what was wrong and what would have been valid; `kind`
//! groups them the way the C ABI numbers them.

/// Result of a codec call.
pub type Result<T> = std::result::Result<T, Error>;

/// What the codec refuses, and why.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("recipe: {0}")]
    BadRecipe(String),
    #[error("model description: {0}")]
    BadModel(String),
    #[error("calibration file: {0}")]
    BadCalibration(String),
    #[error(
        "recipe '{recipe}' needs a calibration file; make one with `kakeya calibrate MODEL`, or choose '{alternative}'"
    )]
    CalibrationRequired { recipe: String, alternative: String },
    #[error("calibration file does not fit the model: {what} is {found}, the model has {expected}")]
    CalibrationMismatch { what: &'static str, found: String, expected: String },
    #[error("not supported: {0}")]
    Unsupported(String),
    #[error(
        "{stream} of token {token}, channel {channel} (layer {layer}, KV head {head}, block {block}) is {value}; a page holds finite values only"
    )]
    NonFinite {
        stream: &'static str,
        layer: usize,
        head: usize,
        block: usize,
        token: usize,
        channel: usize,
        value: f32,
    },
    #[error("page: {0}")]
    BadPage(String),
    #[error("{what} is '{found}', expected '{expected}'")]
    WrongVersion { what: &'static str, found: String, expected: String },
    #[error("{what} is {value}; valid: {valid}")]
    OutOfRange { what: &'static str, value: i64, valid: String },
    #[error("block {block} holds a partial sequence but has no open block (open_slot[{block}] = {slot})")]
    NoOpenSlot { block: usize, slot: i32 },
    #[error("{what} holds {have} elements, {need} are needed")]
    BufferTooSmall { what: &'static str, have: usize, need: usize },
    #[error("{0}: size overflows")]
    Overflow(&'static str),
}

/// The class of an [`Error`]; the C ABI gives each a frozen number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    BadRecipe,
    BadModel,
    BadCalibration,
    CalibrationRequired,
    CalibrationMismatch,
    Unsupported,
    NonFinite,
    BadPage,
    WrongVersion,
    OutOfRange,
    NoOpenSlot,
    BufferTooSmall,
    Overflow,
}

impl Error {
    /// The class of this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::BadRecipe(_) => ErrorKind::BadRecipe,
            Error::BadModel(_) => ErrorKind::BadModel,
            Error::BadCalibration(_) => ErrorKind::BadCalibration,
            Error::CalibrationRequired { .. } => ErrorKind::CalibrationRequired,
            Error::CalibrationMismatch { .. } => ErrorKind::CalibrationMismatch,
            Error::Unsupported(_) => ErrorKind::Unsupported,
            Error::NonFinite { .. } => ErrorKind::NonFinite,
            Error::BadPage(_) => ErrorKind::BadPage,
            Error::WrongVersion { .. } => ErrorKind::WrongVersion,
            Error::OutOfRange { .. } => ErrorKind::OutOfRange,
            Error::NoOpenSlot { .. } => ErrorKind::NoOpenSlot,
            Error::BufferTooSmall { .. } => ErrorKind::BufferTooSmall,
            Error::Overflow(_) => ErrorKind::Overflow,
        }
    }
}

/// Refuses `value >= bound` (or a negative that was cast) with the valid range in the message.
pub(crate) fn check_index(what: &'static str, value: usize, bound: usize) -> Result<()> {
    if value < bound {
        return Ok(());
    }
    let valid = if bound == 0 { "none (empty)".to_string() } else { format!("0..={}", bound - 1) };
    Err(Error::OutOfRange { what, value: value as i64, valid })
}
