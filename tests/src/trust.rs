//! A trust domain over the hosts of a network.

use std::{net::IpAddr, path::Path};

use tempfile::TempDir;

use crate::{Finished, Host, built};

/// A certificate authority, away from all hosts.
#[derive(Debug)]
pub struct Trust {
    folder: TempDir,
}

impl Trust {
    /// Makes `example.com`, and enrols hosts as members: `client` is `client.example.com`.
    ///
    /// # Panics
    /// The command fails.
    #[must_use]
    pub fn of(hosts: &[&Host]) -> Self {
        let it = Self { folder: tempfile::tempdir().unwrap() };
        it.ca(&["init", "--trust-domain", "example.com"]);
        for host in hosts {
            it.enrol(host, &[]);
        }
        it.publish(hosts);
        it
    }

    /// Enrols a host, or gives it new certificates.
    pub fn enrol(&self, host: &Host, more: &[&str]) {
        self.certify("host", host, more);
    }

    /// Gives a host that is enrolled new certificates.
    pub fn renew(&self, host: &Host, more: &[&str]) {
        self.certify("renew", host, more);
    }

    fn certify(&self, what: &str, host: &Host, more: &[&str]) {
        let addresses = host.addresses().map(|ip| ip.to_string());
        let (state, name) = (host.state(), format!("{}.example.com", host.name));
        let mut words = vec![what, &name, "--out", state.to_str().unwrap()];
        words.extend(addresses.iter().flat_map(|ip| ["--address", ip]));
        words.extend(more);
        self.ca(&words);
    }

    /// Has what a host signs with, and so all that it certifies, end at a time (seconds since the Unix epoch), which may
    /// be past.
    pub fn ends(&self, host: &Host, until: u64) {
        let root = self.folder.path().join("ca/root").display().to_string();
        let at = |seconds: u64| {
            let mut date = std::process::Command::new("date");
            let said = Finished::of(date.args(["-u", "-d", &format!("@{seconds}"), "+%Y%m%d%H%M%SZ"]));
            said.success().trim().to_owned()
        };
        let [from, until] = [until - 3600, until].map(at);
        sign_again(&host.state(), "issuer", &root, [&from, &until], "again");
        script(&host.state(), "mv again.crt issuer.crt");
    }

    /// Certificates in a folder of their own, for a stock program.
    pub fn certificate(&self, name: &str, addresses: &[IpAddr], folder: &Path) {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let mut words = vec!["host", name, "--out", folder.to_str().unwrap()];
        words.extend(addresses.iter().flat_map(|ip| ["--address", ip.as_str()]));
        self.ca(&words);
    }

    /// Brings hosts the newest list of members.
    pub fn publish(&self, hosts: &[&Host]) {
        for host in hosts {
            self.ca(&["renew", "--out", host.state().to_str().unwrap()]);
        }
    }

    /// `portcullis ca` of this trust domain.
    ///
    /// # Panics
    /// It fails.
    pub fn ca(&self, words: &[&str]) -> String {
        let mut command = std::process::Command::new(built::portcullis());
        command.arg("ca").args(words).arg("--state").arg(self.folder.path());
        Finished::of(&mut command).success()
    }
}

/// A shell script to its end, in a folder.
fn script(folder: &Path, lines: &str) {
    let mut shell = std::process::Command::new("sh");
    Finished::of(shell.args(["-e", "-c", lines]).current_dir(folder)).success();
}

/// Has `NAME.crt` in a folder signed once more, by `BY.crt` and `BY.key`: the same in all, but valid between two times
/// as openssl-ca(1) writes them. It is `TO.crt`, without a chain.
fn sign_again(folder: &Path, name: &str, by: &str, [from, until]: [&str; 2], to: &str) {
    let lines = format!(
        "printf '[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nnew_certs_dir=.\nrand_serial=yes\npolicy=p\n\
         default_md=sha256\ncopy_extensions=copyall\n[p]\ncommonName=supplied\n' > ca.cnf\n\
         : > index.txt\n\
         openssl x509 -x509toreq -copy_extensions copyall -in {name}.crt -signkey {name}.key -out again.csr\n\
         openssl ca -batch -notext -config ca.cnf -in again.csr -cert {by}.crt -keyfile {by}.key \
         -startdate {from} -enddate {until} -out {to}.crt"
    );
    script(folder, &lines);
}

/// Puts `expired.crt` and `expired.key` beside a host's own: the same in all, but of last year.
pub fn expired(folder: &Path) {
    sign_again(folder, "host", "issuer", ["20250101000000Z", "20250201000000Z"], "leaf");
    script(folder, "cat leaf.crt issuer.crt > expired.crt\ncp host.key expired.key");
}

/// Puts `foreign.crt` and `foreign.key` there, which `CN=mallory` has signed herself.
pub fn foreign(folder: &Path) {
    script(
        folder,
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=mallory -days 9 \
         -addext basicConstraints=critical,CA:FALSE \
         -keyout foreign.key -out foreign.crt",
    );
}
