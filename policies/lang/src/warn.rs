//! What is legal and surely not meant.

use crate::{check::Checked, diagnostic::Diagnostics, source::Source};

/// Characters that look like others, or change how a line is shown.
pub(crate) fn characters(_sources: &[Source], _out: &mut Diagnostics) {}

/// Rules that cannot mean what they say.
pub(crate) fn warn(_checked: &Checked, _out: &mut Diagnostics) {}
