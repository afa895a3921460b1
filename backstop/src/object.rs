//! From the compiled object to maps and programs in the kernel.
//!
//! aya's own loader takes in all of the kernel's type information, twice; what is needed of it is in
//! [`crate::types`].

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use aya_obj::{Map, Object, Program, generated::bpf_insn};

use crate::{
    error::BackstopError,
    sys::{self, Kind},
    types::Types,
};

/// Maps and programs by their names in the source.
pub struct Loaded {
    maps: HashMap<String, OwnedFd>,
    programs: HashMap<String, OwnedFd>,
}

fn refused<E: std::error::Error + Send + Sync + 'static>(error: E) -> BackstopError {
    BackstopError::Load(Box::new(error))
}

impl Loaded {
    /// Loads the object. `hook` tells under which `enum bpf_attach_type` a program will run; one for which
    /// it has none is an iterator over tasks.
    pub fn new(object: &[u8], hook: impl Fn(&str) -> Option<u32> + Sync) -> Result<Self, BackstopError> {
        let mut object = Object::parse(object).map_err(refused)?;
        let shapes: Vec<(String, Map)> = object.maps.drain().collect();
        let (types, maps) = std::thread::scope(|scope| {
            let types = scope.spawn(Types::of_kernel);
            let maps = make(&shapes);
            (types.join(), maps)
        });
        let types = types.map_err(|_| BackstopError::Missing("types"))??;
        let maps = maps.map_err(refused)?;
        object.relocate_btf(&types.btf).map_err(refused)?;
        let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
        let named = shapes.iter().filter_map(|(name, map)| Some((&**name, maps.get(name)?.as_raw_fd(), map)));
        object.relocate_maps(named, &sections).map_err(refused)?;
        object.relocate_calls(&sections).map_err(refused)?;
        let load = |name: &str, program: &Program, code: &[bpf_insn]| {
            let kind = hook(name).map_or(Kind::TaskIterator(types.iterator), Kind::OnCgroup);
            sys::load(kind, name, code, &program.license)
                .map(|loaded| (name.to_owned(), loaded))
                .map_err(|source| BackstopError::Program { program: name.to_owned(), source })
        };
        let mut all: Vec<(&str, &Program, &[bpf_insn])> = Vec::new();
        for (name, program) in &object.programs {
            let code = object.functions.get(&program.function_key()).map(|f| &*f.instructions);
            all.push((name, program, code.unwrap_or_default()));
        }
        // The kernel's verifier takes the most time of all: two of them take half of it each.
        all.sort_by_key(|(.., code)| code.len());
        let every_second =
            |from| all.iter().skip(from).step_by(2).map(|(name, program, code)| load(name, program, code));
        let loaded = std::thread::scope(|scope| {
            let beside = scope.spawn(|| every_second(0).collect::<Vec<_>>());
            let mut loaded: Vec<_> = every_second(1).collect();
            loaded.extend(beside.join().unwrap_or_default());
            loaded
        });
        Ok(Self { maps, programs: loaded.into_iter().collect::<Result<_, _>>()? })
    }

    /// A program.
    pub fn program(&mut self, name: &'static str) -> Result<OwnedFd, BackstopError> {
        self.programs.remove(name).ok_or(BackstopError::Missing(name))
    }

    /// A map.
    pub fn map(&mut self, name: &'static str) -> Result<OwnedFd, BackstopError> {
        self.maps.remove(name).ok_or(BackstopError::Missing(name))
    }
}

/// Makes the maps, and fills those that are the object's constants.
fn make(shapes: &[(String, Map)]) -> io::Result<HashMap<String, OwnedFd>> {
    let one = |(name, map): &(String, Map)| {
        let shape = [map.map_type(), map.key_size(), map.value_size(), map.max_entries(), map.map_flags()];
        let made = sys::create(name, shape)?;
        if !map.data().is_empty() {
            sys::update(made.as_fd(), &[0; 4], map.data())?;
        }
        Ok((name.clone(), made))
    };
    shapes.iter().map(one).collect()
}
