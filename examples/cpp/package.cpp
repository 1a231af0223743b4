#include "package.h"

#include <ATen/ATen.h>
#include <caffe2/serialize/inline_container.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <sstream>
#include <unordered_map>

namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;

// The whole file, privately: a write to a weight would not reach it.
std::shared_ptr<void> map_file(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY);
    TORCH_CHECK(file >= 0, path, " cannot be opened");
    struct stat described {};
    TORCH_CHECK(fstat(file, &described) == 0, path, " cannot be read");
    const size_t size = static_cast<size_t>(described.st_size);
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    close(file);
    TORCH_CHECK(memory != MAP_FAILED, path, " cannot be mapped");
    return {memory, [size](void* address) { munmap(address, size); }};
}

at::ScalarType dtype_of(const std::string& name) {
    static const std::unordered_map<std::string, at::ScalarType> known{
        {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf},
        {"float64", at::kDouble}, {"int64", at::kLong}, {"int32", at::kInt},
        {"int8", at::kChar}, {"uint8", at::kByte}, {"bool", at::kBool}};
    const auto found = known.find(name);
    TORCH_CHECK(found != known.end(), "unknown dtype ", name);
    return found->second;
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

std::vector<int64_t> extents(const std::string& text) {
    std::vector<int64_t> sizes;
    for (const auto& part : split(text, ' ')) sizes.push_back(std::stoll(part));
    return sizes;
}

}  // namespace

struct Package::Parts {
    struct State {
        at::Tensor tensor;
        double fill;
    };

    std::shared_ptr<void> mapped;  // has to live as long as the tensors that lie in it
    std::unordered_map<std::string, at::Tensor> constants;
    std::vector<State> states;
    std::unique_ptr<Loader> prefill, decode;
    int64_t batch = 1, fed = 0;

    // weights.txt has, tab separated: kind, constant, dtype, offset or fill, extents.
    void read_index(const std::string& path) {
        caffe2::serialize::PyTorchStreamReader reader(path);
        const auto [text, size] = reader.getRecord("weights.txt");
        mapped = map_file(path);
        auto* bytes = static_cast<char*>(mapped.get()) + reader.getRecordOffset("weights.bin");
        for (const auto& line : split({static_cast<const char*>(text.get()), size}, '\n')) {
            const auto fields = split(line, '\t');
            TORCH_CHECK(fields.size() >= 4, "weights.txt has the line ", line);
            const auto sizes = fields.size() > 4 ? extents(fields[4]) : std::vector<int64_t>{};
            const auto options = at::TensorOptions(dtype_of(fields[2]));
            if (fields[0] == "tensor") {
                void* data = bytes + std::stoull(fields[3]);
                constants[fields[1]] = at::from_blob(data, sizes, options);
            } else {
                const double fill = std::stod(fields[3]);
                states.push_back({at::full(sizes, fill, options), fill});
                constants[fields[1]] = states.back().tensor;
                batch = sizes.at(0);
            }
        }
    }

    // Constants are not copied: all entries read the same weights and write to the same states.
    std::unique_ptr<Loader> load(const std::string& path, const std::string& entry) const {
        auto loader = std::make_unique<Loader>(path, entry);
        std::unordered_map<std::string, at::Tensor> own;
        for (const auto& name : loader->get_constant_fqns()) own[name] = constants.at(name);
        loader->load_constants(own, /*use_inactive=*/false, /*check_full_update=*/true,
                               /*user_managed=*/true);
        return loader;
    }

    // Logits [batch, 1, vocab_size] of the last of the tokens [batch, q_len].
    at::Tensor run(const at::Tensor& tokens) {
        const int64_t q_len = tokens.size(1), total = fed + q_len;
        const auto& entry = q_len == 1 ? decode : prefill;
        const auto positions = at::arange(total, at::kLong).expand({batch, total});
        std::vector<at::Tensor> inputs;
        for (const auto& name : split(entry->get_metadata().at("inputs"), ' ')) {
            if (name == "input_ids") inputs.push_back(tokens);
            else if (name == "positions") inputs.push_back(positions.slice(1, fed).contiguous());
            else if (name == "entry_positions") inputs.push_back(positions.contiguous());
            else inputs.push_back(at::full({1}, q_len - 1, at::kLong));  // rows: the last
        }
        fed = total;
        return entry->run(inputs).at(0);
    }
};

Package::Package(const std::string& path) : parts_(std::make_unique<Parts>()) {
    parts_->read_index(path);
    parts_->prefill = parts_->load(path, "prefill");
    parts_->decode = parts_->load(path, "decode");
}

Package::~Package() = default;

int64_t Package::batch() const { return parts_->batch; }

std::vector<int64_t> Package::feed(const std::vector<int64_t>& tokens) {
    const at::AutoDispatchBelowADInplaceOrView no_gradients;
    const auto rows = at::tensor(tokens, at::kLong).view({parts_->batch, -1});
    const auto next = parts_->run(rows).select(1, -1).argmax(-1);
    return {next.data_ptr<int64_t>(), next.data_ptr<int64_t>() + next.numel()};
}

void Package::reset() {
    for (auto& state : parts_->states) state.tensor.fill_(state.fill);
    parts_->fed = 0;
}
