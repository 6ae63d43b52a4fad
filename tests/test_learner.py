"Weights, heads and groups of real architectures"
import copy
from functools import partial
import pytest, timm, torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import squeezenet1_1
from fgvc_fisher.learner import (
    aircraft_learner, aircraft_splitter, head_names, load_weights, n_outputs, remake_head, source_model
)
from fgvc_fisher.data import aircraft_dls
from conftest import mobilenet

def test_weights_of_another_architecture(tmp_path):
    save_file(timm.create_model('test_efficientnet').state_dict(), tmp_path/'e.safetensors')
    with pytest.raises(ValueError, match='e.safetensors.*ResNet.*bn1.bias.*blocks.0.0'):
        source_model('test_resnet', tmp_path/'e.safetensors')
    save_file(timm.create_model('test_resnet', num_classes=7).state_dict(), tmp_path/'r.safetensors')
    with pytest.raises(ValueError, match=r'fc.bias \(7,\).*\(1000,\)'):
        load_weights(timm.create_model('test_resnet'), tmp_path/'r.safetensors')
    # the file determines the number of classes
    model = source_model('test_resnet', tmp_path/'r.safetensors')
    assert model.num_classes==7 and torch.equal(model.fc.weight, load_file(tmp_path/'r.safetensors')['fc.weight'])

@pytest.mark.parametrize('name', ['junk.safetensors', 'junk.pth'])
def test_a_file_that_cannot_be_loaded(name, tmp_path):
    (tmp_path/name).write_bytes(b'this is a page that says 404')
    with pytest.raises(ValueError, match=name): source_model('test_resnet', tmp_path/name)

@pytest.mark.parametrize('arch,said',
    [('os:getcwd', 'str'), ('os:nothing', 'nothing'), ('nowhere.at.all:f', 'nowhere')])
def test_a_function_that_makes_no_network(arch, said):
    with pytest.raises(ValueError, match=f'{arch}.*{said}'): source_model(arch, weights=None)

def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.safetensors'):
        source_model('test_resnet', tmp_path/'none.safetensors')

@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s, 'epoch': 3}])
def test_state_dict_of_pytorch_without_counters(tmp_path, wrap):
    model = timm.create_model('test_resnet')
    torch.save(wrap({k: v for k,v in model.state_dict().items() if 'num_batches_tracked' not in k}), tmp_path/'w.pth')
    again = source_model('test_resnet', tmp_path/'w.pth')
    assert all(torch.equal(p, q) for p,q in zip(model.parameters(), again.parameters()))

def test_learner_leaves_the_source_alone(drawn):
    source = source_model('test_resnet', weights=None)
    dls = aircraft_dls(drawn, size=32, bs=8, num_workers=0)
    learn = aircraft_learner(dls, source)
    theta0 = dict(source.named_parameters())
    body = {n: p for n,p in learn.model.named_parameters() if not n.startswith('fc.')}
    assert all(torch.equal(p, theta0[n]) for n,p in body.items())
    before = {k: v.clone() for k,v in source.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1)
    assert all(torch.equal(v, before[k]) for k,v in source.state_dict().items())

MODELS = [mobilenet, squeezenet1_1, *(partial(timm.create_model, o) for o in ('test_vit','test_convnext'))]

@pytest.mark.parametrize('make', MODELS)
def test_every_parameter_is_in_one_group(make):
    model = remake_head(make(), 5)
    groups = aircraft_splitter(model)
    assert [id(p) for g in groups for p in g]==[id(p) for p in model.parameters()]
    assert sum(p.numel() for p in groups[-1]) % 5==0 and len(groups)==2

def test_inception_v4_has_the_papers_groups():
    with torch.device('meta'): model = timm.create_model('inception_v4', num_classes=105)
    groups = aircraft_splitter(model)
    assert [sum(p.numel() for p in g) for g in groups][-1]==1536*105+105 and len(groups)==3
    assert sum(p.numel() for g in groups for p in g)==41_304_201

# The kinds of heads in timm: `get_classifier` returns a layer, a module with more than one, a list or a tuple
HEADS = dict(
    test_resnet=['fc'], test_vit=['head'], test_convnext=['head.fc'], test_efficientnet=['classifier'],
    vgg11=['head'], densenet121=['classifier'], legacy_seresnet18=['last_linear'], inception_v4=['last_linear'],
    inception_resnet_v2=['classif'], dpn68=['classifier'], resnet50_clip=['head.proj'], regnetx_002=['head'],
    swin_tiny_patch4_window7_224=['head'], caformer_s18=['head.fc'], poolformer_s12=['head.fc'],
    inception_next_tiny=['head.fc2'], efficientvit_b0=['head.classifier.4'], efficientvit_m0=['head'],
    volo_d1_224=['aux_head','head'], crossvit_9_240=['head'], repvit_m0_9=['head'])
HEADS |= {arch: ['head','head_dist'] for arch in (
    'levit_128', 'levit_conv_128s', 'deit_tiny_distilled_patch16_224', 'pit_ti_distilled_224', 'efficientformer_l1',
    'efficientformerv2_s0', 'swiftformer_xs')}

@pytest.mark.parametrize('arch', HEADS)
def test_the_head_is_what_is_new(arch):
    with torch.device('meta'): model = timm.create_model(arch)
    assert head_names(model)==HEADS[arch] and n_outputs(model)==model.num_classes
    old = list(model.parameters())
    body = {id(p) for p in old}
    before = torch.get_rng_state()
    assert head_names(torch.compile(model))==HEADS[arch]                     # draws no random numbers
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device('meta'): remake_head(model, 5)
    *others,head = aircraft_splitter(model)
    assert head and body.isdisjoint(map(id, head)) and all(id(p) in body for group in others for p in group)
    assert head_names(model)==HEADS[arch] and n_outputs(model)==5
    assert sum(map(len, others))+len(head)==len(list(model.parameters()))

@pytest.mark.parametrize('arch', HEADS)
def test_the_head_of_a_network_without_outputs(arch):
    with torch.device('meta'):
        model = timm.create_model(arch, num_classes=0)
        assert n_outputs(remake_head(model, 5))==5

@pytest.mark.parametrize('arch', ['deit_tiny_distilled_patch16_224', 'levit_128s'])
def test_freezing_trains_both_heads(arch, drawn):
    dls = aircraft_dls(drawn, size=224, bs=2, num_workers=0, fraction=0.25)
    learn = aircraft_learner(dls, arch, weights=None, train_bn=False)
    before = copy.deepcopy(learn.model)
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1)
    changed = {n for n,p in learn.model.named_parameters() if not torch.equal(p.cpu(), before.get_parameter(n).cpu())}
    assert {n.split('.')[0] for n in changed}=={'head','head_dist'}

def test_no_head():
    with pytest.raises(ValueError, match='ReLU'): remake_head(nn.ReLU(), 3)
