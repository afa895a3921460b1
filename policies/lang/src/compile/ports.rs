//! From protocol and port to the services that contain them.

use portcullis_types::Protocol;

use crate::{
    services::Service,
    source::{to_u32, to_usize},
};

/// Longest list of services by class; services that overlap more than this are not indexed.
const LONGEST: usize = 4 << 20;

/// Services by port: two steps for any port, whatever the number of services.
#[derive(Debug)]
pub(super) struct PortIndex {
    /// By protocol number: which table; 0 is the one of protocols that only `*` is for.
    protocols: Box<[u8; 256]>,
    tables: Vec<PortTable>,
    /// Distinct pages of 256 ports each, as classes.
    pages: Vec<[u16; 256]>,
    /// By class: where in `lists` its services stand.
    classes: Vec<(u32, u32)>,
    lists: Vec<u32>,
}

#[derive(Debug)]
struct PortTable {
    pages: [u16; 256],
    /// Ports at which the class changes, ascending, 0 the first.
    starts: Vec<u16>,
}

impl PortIndex {
    /// `None` if services overlap in more ways than any policy written by people.
    pub(super) fn new(services: &[&Service]) -> Option<Self> {
        let any: Vec<u32> = (0..to_u32(services.len())).filter(|s| is_any(services, *s)).collect();
        let mut index = Self {
            protocols: Box::new([0; 256]),
            tables: Vec::new(),
            pages: Vec::new(),
            classes: Vec::new(),
            lists: Vec::new(),
        };
        let mut known = std::collections::HashMap::new();
        let mut page_numbers = std::collections::HashMap::new();
        // By protocol: where services begin and end.
        let mut events: std::collections::BTreeMap<u8, Vec<(u32, bool, u32)>> =
            std::collections::BTreeMap::new();
        for (number, service) in services.iter().enumerate() {
            for ports in &service.ports {
                let list = events.entry(ports.protocol.0).or_default();
                list.push((u32::from(ports.low), true, to_u32(number)));
                list.push((u32::from(ports.high) + 1, false, to_u32(number)));
            }
        }
        index.add_table(&mut [], &any, &mut known, &mut page_numbers)?;
        for (protocol, mut list) in events {
            let number = u8::try_from(index.tables.len()).ok()?;
            *index.protocols.get_mut(usize::from(protocol))? = number;
            index.add_table(&mut list, &any, &mut known, &mut page_numbers)?;
        }
        Some(index)
    }

    fn add_table(
        &mut self,
        events: &mut [(u32, bool, u32)],
        any: &[u32],
        known: &mut std::collections::HashMap<Vec<u32>, u16>,
        page_numbers: &mut std::collections::HashMap<Vec<u16>, u16>,
    ) -> Option<()> {
        events.sort_unstable();
        let mut here: std::collections::BTreeSet<u32> = any.iter().copied().collect();
        let mut runs: Vec<(u32, u16)> = Vec::new();
        let mut at = 0;
        let mut port = 0;
        while port <= 0xffff {
            while let Some((_, begins, service)) = events.get(at).filter(|e| e.0 <= port) {
                if *begins {
                    here.insert(*service)
                } else {
                    here.remove(service)
                };
                at += 1;
            }
            let list: Vec<u32> = here.iter().copied().collect();
            let class = match known.get(&list) {
                Some(class) => *class,
                None => {
                    let class = u16::try_from(self.classes.len()).ok()?;
                    self.classes.push((to_u32(self.lists.len()), to_u32(self.lists.len() + list.len())));
                    self.lists.extend(&list);
                    if self.lists.len() > LONGEST {
                        return None;
                    }
                    known.insert(list, class);
                    class
                }
            };
            runs.push((port, class));
            port = events.get(at).map_or(0x1_0000, |e| e.0);
        }
        let mut table = PortTable { pages: [0; 256], starts: Vec::with_capacity(runs.len()) };
        let mut classes = Vec::with_capacity(0x1_0000);
        for (i, (start, class)) in runs.iter().enumerate() {
            let end = runs.get(i + 1).map_or(0x1_0000, |next| next.0);
            classes.resize(to_usize(end), *class);
            table.starts.push(u16::try_from(*start).ok()?);
        }
        for (number, page) in classes.chunks(256).enumerate() {
            let found = match page_numbers.get(page) {
                Some(found) => *found,
                None => {
                    let found = u16::try_from(self.pages.len()).ok()?;
                    self.pages.push(page.try_into().ok()?);
                    page_numbers.insert(page.to_vec(), found);
                    found
                }
            };
            *table.pages.get_mut(number)? = found;
        }
        self.tables.push(table);
        Some(())
    }

    fn table(&self, protocol: Protocol) -> Option<&PortTable> {
        self.tables.get(usize::from(*self.protocols.get(usize::from(protocol.0))?))
    }

    /// The services that contain a port.
    #[inline]
    pub(super) fn services(&self, protocol: Protocol, port: u16) -> &[u32] {
        let port = if protocol.has_ports() { port } else { 0 };
        let [page, low] = port.to_be_bytes();
        let class = self
            .table(protocol)
            .and_then(|t| t.pages.get(usize::from(page)))
            .and_then(|p| self.pages.get(usize::from(*p)))
            .and_then(|p| p.get(usize::from(low)))
            .and_then(|c| self.classes.get(usize::from(*c)));
        let range = class.map_or(0..0, |(start, end)| to_usize(*start)..to_usize(*end));
        self.lists.get(range).unwrap_or_default()
    }

    /// The ports around one that are in the same services.
    pub(super) fn around(&self, protocol: Protocol, port: u16) -> std::ops::RangeInclusive<u16> {
        if !protocol.has_ports() {
            return 0..=u16::MAX;
        }
        let Some(table) = self.table(protocol) else { return port..=port };
        let next = table.starts.partition_point(|start| *start <= port);
        let low = next.checked_sub(1).and_then(|n| table.starts.get(n)).copied().unwrap_or(0);
        let high = table.starts.get(next).map_or(u16::MAX, |start| start - 1);
        low..=high
    }
}

fn is_any(services: &[&Service], number: u32) -> bool {
    services.get(to_usize(number)).is_some_and(|s| s.any)
}
