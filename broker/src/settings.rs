//! Settings (not policy): `STATE/portcullis.toml`, else `/etc/portcullis/portcullis.toml`.

use std::{fs, io::ErrorKind, path::Path};

use serde::Deserialize;

use crate::BrokerError;

/// What may be set. Every key is optional; an unknown one is an error.
///
/// ```toml
/// [audit]
/// rotate_mib = 64             # a file of the log is full at this size
/// rotate_hours = 24           # and at this age
/// keep_files = 0              # oldest files beyond this number are removed; 0: none ever
/// when_unwritable = "refuse"  # or "permit": go on without a record; losses are counted
///
/// [limits]
/// channels_per_user = 4096
/// processes_per_user = 2048
/// ```
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The audit log.
    pub audit: Audit,
    /// What one user may have of the broker.
    pub limits: Limits,
}

/// See [`Settings`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Audit {
    /// Size at which a file is full, in MiB.
    pub rotate_mib: u64,
    /// Age at which a file is full, in hours.
    pub rotate_hours: u64,
    /// How many full files stay; 0: all.
    pub keep_files: usize,
    /// What becomes of new flows while the log cannot be written.
    pub when_unwritable: WhenUnwritable,
}

/// See [`Audit::when_unwritable`].
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum WhenUnwritable {
    /// They are refused.
    Refuse,
    /// They are judged as ever; records that are lost are counted.
    Permit,
}

/// See [`Settings`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Doors and channels of one user.
    pub channels_per_user: usize,
    /// Processes of one user that have memory here.
    pub processes_per_user: usize,
}

impl Default for Audit {
    fn default() -> Self {
        Self { rotate_mib: 64, rotate_hours: 24, keep_files: 0, when_unwritable: WhenUnwritable::Refuse }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { channels_per_user: 4096, processes_per_user: 2048 }
    }
}

/// Largest settings file that is read, in bytes.
const MOST: u64 = 1 << 20;

impl Settings {
    /// Reads the first file that exists.
    ///
    /// # Errors
    /// [`BrokerError::Settings`] if it cannot be read or does not say what it may.
    pub fn read(state: &Path) -> Result<Self, BrokerError> {
        let places = [state.join("portcullis.toml"), Path::new("/etc/portcullis/portcullis.toml").to_owned()];
        for path in places {
            let wrong = |reason: String| BrokerError::Settings { path: path.clone(), reason };
            match fs::metadata(&path) {
                Err(gone) if gone.kind() == ErrorKind::NotFound => continue,
                Err(other) => return Err(wrong(other.to_string())),
                Ok(about) if !about.is_file() => return Err(wrong("not a file".into())),
                Ok(about) if about.len() > MOST => return Err(wrong(format!("larger than {MOST} bytes"))),
                Ok(_) => {}
            }
            let text = fs::read_to_string(&path).map_err(|e| wrong(e.to_string()))?;
            return toml::from_str(&text).map_err(|e| wrong(e.to_string()));
        }
        Ok(Self::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_example_is_the_default() {
        let source = include_str!("settings.rs");
        let example: String = source
            .lines()
            .skip_while(|l| !l.contains("```toml"))
            .skip(1)
            .take_while(|l| !l.contains("```"))
            .map(|l| format!("{}\n", l.trim_start_matches("///")))
            .collect();
        assert_eq!(toml::from_str::<Settings>(&example).unwrap(), Settings::default());
    }

    #[test]
    fn unknown_keys_and_broken_files_are_errors_and_none_is_the_default() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(Settings::read(state.path()).unwrap(), Settings::default());
        let file = state.path().join("portcullis.toml");
        for broken in ["[audit]\nrotate = 1\n", "[audit\n", "\u{0}"] {
            fs::write(&file, broken).unwrap();
            assert!(matches!(Settings::read(state.path()), Err(BrokerError::Settings { .. })), "{broken}");
        }
        fs::write(&file, "[audit]\nwhen_unwritable = \"permit\"\n").unwrap();
        assert_eq!(Settings::read(state.path()).unwrap().audit.when_unwritable, WhenUnwritable::Permit);
    }
}
