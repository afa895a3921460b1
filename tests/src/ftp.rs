//! FTP daemons and clients.
